"""Prompts for BABILong qa1-qa5 in longroll's own words, and the labels that its metric looks for.

`longroll.tasks.official` reads the official prompts. Source of the labels: booydar/babilong,
babilong/metrics.py (TASK_LABELS).
"""

_PLACES = frozenset({"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"})
LABELS = {
    "qa1": _PLACES,
    "qa2": _PLACES,
    "qa3": _PLACES,
    "qa4": _PLACES,
    "qa5": frozenset({"bill", "fred", "jeff", "mary", "apple", "football", "milk"}),
}

SHORT = "{context}\nQuestion: {question}\nAnswer:"
"""For models finetuned on the task: nothing that has to be understood first."""

_CARRIED = "People take things along when they walk and leave them where they put them down."
_MOVES = f"A long text mentions who walks where and who carries what. {_CARRIED}"
_INSTRUCTION = {
    "qa1": "A long text mentions now and then where people go. Say where the person in question went last.",
    "qa2": f"{_MOVES} Say where the thing is now.",
    "qa3": f"{_MOVES} Say where the thing was just before the place in question.",
    "qa4": "A long text mentions which room lies in which direction of another. Say which room is asked for.",
    "qa5": "A long text mentions who hands what to whom. Say which person or which thing is asked for.",
}
_FORM = "Reply with a single word and a full stop."

_EXAMPLES = {
    "qa1": (
        ("Nora went to the cellar. Paul ran to the attic. Nora ran to the porch.", "Where is Nora?", "porch"),
        ("Lena hurried to the stable. Otto walked to the barn.", "Where is Lena?", "stable"),
    ),
    "qa2": (
        ("Nora took the lamp. Nora went to the cellar. Paul ran away.", "Where is the lamp?", "cellar"),
        (
            "Otto took the rope. Otto ran to the barn. Otto left the rope. Otto ran to the stable.",
            "Where is the rope?",
            "barn",
        ),
    ),
    "qa3": (
        (
            "Nora took the lamp. Nora ran to the porch. Nora went to the cellar. Nora ran to the attic.",
            "Where was the lamp before the attic?",
            "cellar",
        ),
        (
            "Otto ran to the barn. Otto took the rope. Otto walked to the stable.",
            "Where was the rope before the stable?",
            "barn",
        ),
    ),
    "qa4": (
        (
            "The cellar is south of the attic. The porch is east of the attic.",
            "What is the cellar south of?",
            "attic",
        ),
        (
            "The barn is west of the stable. The shed is north of the stable.",
            "What is north of the stable?",
            "shed",
        ),
    ),
    "qa5": (
        (
            "Nora took the lamp. Nora handed the lamp to Otto. Paul ran to the attic.",
            "Who did Nora hand the lamp to?",
            "Otto",
        ),
        ("Lena took the rope. Lena passed the rope to Paul.", "What did Lena pass to Paul?", "rope"),
    ),
}


def own_prompt(qa: str) -> str:
    """Return the few-shot prompt of a task, with `{context}` and `{question}` to be filled in."""
    examples = [
        f"Text:{SHORT.format(context=f' {facts}', question=question)} {answer}.\n\n"
        for facts, question, answer in _EXAMPLES[qa]
    ]
    return f"{_INSTRUCTION[qa]} {_FORM}\n\n{''.join(examples)}Text:{SHORT}"

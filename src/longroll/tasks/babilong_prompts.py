"""The few-shot prompts and the labels of BABILong qa1-qa5, word for word.

Source: booydar/babilong (Apache-2.0), babilong/prompts.py (DEFAULT_TEMPLATE, DEFAULT_PROMPTS) and
babilong/metrics.py (TASK_LABELS). The slips in the wording are the source's: results depend on them.
"""

TEMPLATE = (
    "{instruction}\n\n{examples}\n\n{post_prompt}\n\n<context>\n{context}\n</context>\n\nQuestion: {question}"
)

_PLACES = frozenset({"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"})
LABELS = {
    "qa1": _PLACES,
    "qa2": _PLACES,
    "qa3": _PLACES,
    "qa4": _PLACES,
    "qa5": frozenset({"bill", "fred", "jeff", "mary", "apple", "football", "milk"}),
}

_ONLY_FACTS = "You need to answer the question based only on the information from the facts."
_CARRYING = (
    "If a person got an item in the first location and travelled to the second location "
    "the item is also in the second location. "
    "If a person dropped an item in the first location and moved to the second location "
    "the item remains in the first location."
)
_FORMAT = "Always return your answer in the following format: "
_NOTHING_ELSE = " Do not write anything else after that."


def _example(text: str, answer: str) -> str:
    return f"<example>\n{text}\nAnswer: {answer}\n</example>"


INSTRUCTION = {
    "qa1": "I will give you context with the facts about positions of different persons hidden in some "
    f"random text and a question. {_ONLY_FACTS} "
    "If a person was in different locations, use the latest location to answer the question.",
    "qa2": "I give you context with the facts about locations and actions of different persons "
    f"hidden in some random text and a question.{_ONLY_FACTS}\n{_CARRYING}",
    "qa3": "I give you context with the facts about locations and actions of different persons "
    f"hidden in some random text and a question. {_ONLY_FACTS}\n{_CARRYING}",
    "qa4": "I will give you context with the facts about different people, their location and actions, "
    f"hidden in some random text and a question. {_ONLY_FACTS}",
    "qa5": "I will give you context with the facts about locations and their relations hidden in some "
    f"random text and a question. {_ONLY_FACTS}",
}

POST_PROMPT = {
    "qa1": f"{_FORMAT}The most recent location of ’person’ is ’location’.{_NOTHING_ELSE}",  # noqa: RUF001
    "qa2": f"{_FORMAT}The ’item’ is in ’location’.{_NOTHING_ELSE}",  # noqa: RUF001
    "qa3": f"{_FORMAT}Before the $location_1$ the $item$ was in the $location_2$.{_NOTHING_ELSE}",
    "qa4": f"Your answer should contain only one word - location.{_NOTHING_ELSE}",
    "qa5": f"Your answer should contain only one word.{_NOTHING_ELSE} Do not explain your answer.",
}

EXAMPLES = {
    "qa1": "\n\n".join(
        [
            _example(
                "Charlie went to the hallway. Judith come back to the kitchen. Charlie travelled to balcony. "
                "Where is Charlie?",
                "The most recent location of Charlie is balcony.",
            ),
            _example(
                "Alan moved to the garage. Charlie went to the beach. Alan went to the shop. Rouse "
                "travelled to balcony. Where is Alan?",
                "The most recent location of Alan is shop.",
            ),
        ]
    ),
    "qa2": "\n".join(
        [
            _example(
                "Charlie went to the kitchen. Charlie got a bottle. Charlie moved to the balcony. "
                "Where is the bottle?",
                "The bottle is in the balcony.",
            ),
            _example(
                "Alan moved to the garage. Alan got a screw driver. Alan moved to the kitchen. Where "
                "is the screw driver?",
                "The screw driver is in the kitchen.",
            ),
        ]
    ),
    "qa3": "\n".join(
        [
            _example(
                "John journeyed to the bedroom. Mary grabbed the apple. Mary went back to the bathroom. "
                "Daniel journeyed to the bedroom. Daniel moved to the garden. Mary travelled to the kitchen. "
                "Where was the apple before the kitchen?",
                "Before the kitchen the apple was in the bathroom.",
            ),
            _example(
                "John went back to the bedroom. John went back to the garden. John went back to the kitchen. "
                "Sandra took the football. Sandra travelled to the garden. Sandra journeyed to the bedroom. "
                "Where was the football before the bedroom?",
                "Before the bedroom the football was in the garden.",
            ),
        ]
    ),
    "qa4": "\n".join(
        [
            _example(
                "The hallway is south of the kitchen. The bedroom is north of the kitchen. "
                "What is the kitchen south of?",
                "bedroom",
            ),
            _example(
                "The garden is west of the bedroom. The bedroom is west of the kitchen. "
                "What is west of the bedroom?",
                "garden",
            ),
        ]
    ),
    "qa5": "\n".join(
        [
            _example(
                "Mary picked up the apple there. Mary gave the apple to Fred. Mary moved to the bedroom. "
                "Bill took the milk there. Who did Mary give the apple to?",
                "Fred",
            ),
            _example(
                "Jeff took the football there. Jeff passed the football to Fred. Jeff got the milk there. "
                "Bill travelled to the bedroom. Who gave the football?",
                "Jeff",
            ),
            _example(
                "Fred picked up the apple there. Fred handed the apple to Bill. "
                "Bill journeyed to the bedroom. Jeff went back to the garden. What did Fred give to Bill?",
                "apple",
            ),
        ]
    ),
}

"""Laws of the state, tiny random models of every family, and the table of which family keeps which law."""

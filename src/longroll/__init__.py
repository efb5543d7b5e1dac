"""longroll: recurrent language models past their training length."""

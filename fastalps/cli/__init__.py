"""The commands: thin shells over the library; its errors become one line and an exit code."""

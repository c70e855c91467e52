"""Tools that tests share: `from support import ...`."""

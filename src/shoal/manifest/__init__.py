"""Statements that have to be believed later: canonical bytes, private files, a log that cannot be changed unnoticed."""

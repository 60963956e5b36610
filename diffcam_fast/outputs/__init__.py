"""Explanations out: files that are whole or absent, and an account of what is finished."""

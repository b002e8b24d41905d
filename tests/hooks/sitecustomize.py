"""Runs in every Python process of a run under test, before its own code."""

import forking

forking.hand_over()

import polling  # noqa: E402, F401
import watch  # noqa: E402, F401

"""Counts the ops that a test's layers call."""

from tests.helpers.op_calls import calls  # noqa: F401

"""Serving arithmetic: `reference.py` is the truth in plain torch, `dispatch.py` chooses a kernel and says why."""

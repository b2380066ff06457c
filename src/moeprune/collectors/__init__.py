"""Observe a running model and add up what its routers and experts do."""

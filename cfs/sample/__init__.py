"""Drawing text from a model: pure functions, the slots that run them, the stored corpus."""

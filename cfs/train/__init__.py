"""The objective, its estimate of the KL, and the one loop that every method runs in."""

"""What we add to a frozen model: inject it, train it, take it out again. The models know nothing of it."""

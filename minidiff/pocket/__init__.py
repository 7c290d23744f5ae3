"""The pocket world: it is drawn here, and the pocket checkpoint is trained on it from nothing."""

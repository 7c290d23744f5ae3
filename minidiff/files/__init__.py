"""Adapter files of every program, in and out: what they hold, and what they are turned into."""

"""Speed and memory. Without this room minidiff draws the same pictures, more slowly."""

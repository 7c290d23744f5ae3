"""Looking at what the model does: sheets, loops, maps of attention, and how each picture was made."""

"""Reading and writing, colour, resizing and metrics: the only part of fastsr that knows about pixels."""

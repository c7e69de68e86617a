"""`qwantize bench matmul`, a part a file; command.py is the door."""

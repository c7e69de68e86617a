"""`qwantize inspect`: what quantizing does to every layer, as a table, JSON and a page."""

"""A checkpoint as one page for a browser: its modules, who wrote and who reads which bytes, times, losses."""

"""Tables, charts, the page."""

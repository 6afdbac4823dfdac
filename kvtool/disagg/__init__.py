"""One request served by two engines: what it takes on this link, and the router before such engines."""

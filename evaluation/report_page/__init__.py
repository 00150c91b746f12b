"""The parts of the report: tables, plots, published scores and the HTML page."""

"""The parts of the report: tables, plots, curves and the HTML page."""

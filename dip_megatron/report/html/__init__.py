"""A run or a plan as one HTML file that needs no network. Needs Bokeh (the extra ``report``)."""

from .page import facts, write_report

__all__ = ["facts", "write_report"]

"""Self-contained HTML and SVG: the one look of every report.

A report is `page(title, [Section(...), ...])`; a section's body is what the builders below return. Everything is
escaped, nothing is loaded from anywhere, no script runs but one that the page itself is given (a content security
policy says so to the browser), and each picture says in words and in a table what it shows. Charts draw in percent of
their width, so that text keeps its size from a telephone to a wide screen; colours follow the reader's light or dark
setting. The style is `style.css`.
"""

from leveret.pages.charts import Bar, bars, beside, funnel, histogram, lines, plot, scatter
from leveret.pages.document import Section, page
from leveret.pages.pictures import BAD, GOOD, Picture, figure, gallery, thumbnail
from leveret.pages.words import code, link, paragraphs, table, tiles

__all__ = [
    "BAD",
    "GOOD",
    "Bar",
    "Picture",
    "Section",
    "bars",
    "beside",
    "code",
    "figure",
    "funnel",
    "gallery",
    "histogram",
    "lines",
    "link",
    "page",
    "paragraphs",
    "plot",
    "scatter",
    "table",
    "thumbnail",
    "tiles",
]

"""Documents + labels of an annotator -> a classifier of their quality, and scores of documents."""

from slm.stage import callable_package

callable_package(__name__)

"""Read: where samples come from, in which order, and what is wrong with them."""

from __future__ import annotations

from leveret.pool.base import SampleFault, Source
from leveret.pool.check import Checked, check
from leveret.pool.convert import Converted, convert
from leveret.pool.order import order
from leveret.pool.sources import SOURCES, open_source

__all__ = ["SOURCES", "Checked", "Converted", "SampleFault", "Source", "check", "convert", "open_source", "order"]

"""The paper's Table 3 by the name of the row."""

from .suites import ROWS

TABLE_3 = {name: row.paper for name, row in ROWS.items()}

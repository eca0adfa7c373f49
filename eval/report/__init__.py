"""From result lines to a page: pairs, intervals, tables, charts, a verdict."""

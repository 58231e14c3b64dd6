"""Where samples come from: folders, tables, tar shards, generated files; and their classes."""

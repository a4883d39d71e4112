"""Records: read in any layout, passed through an ordered list of steps, written as shards with an index.

files     one file → raw values and where they stood; whatever cannot be read is a value too
formats   a raw value → a `Record`, by the layout of its source
records   `Record`, and `read_records`: what every training stage reads its data with
steps     the pipeline's steps, each with its counters
shards    writers: shuffled or in order, `.jsonl.zst` with an index
funnel    in = out + each drop reason, per source
"""

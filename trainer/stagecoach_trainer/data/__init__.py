"""Records: read from files of any layout, cleaned by an ordered list of steps, written as shards. Imports `runtime`.

records      `Record`, its parts, and its canonical JSON
raw          raw values, the layouts of files by name, streams
signatures   files whose bytes do not match their name
tables       rows of Parquet, CSV and TSV
files        a file → raw values with their line numbers; an unreadable value is yielded as an error
turns        parts of a raw value → turns, tools, strings
formats      a raw value → a `Record`, by the layout of its source
preferences  the layouts of preference records
reading      `read_records`, with which every training stage reads its data
steps        the pipeline's steps, each with its counters
shards       writers: shuffled or in order, `.jsonl.zst` with an index
funnel       per source: records in = records out + records dropped, by reason
"""

"""Records: read from files of any layout, cleaned by an ordered list of steps, written as shards. Imports `runtime`.

records      `Record`, its parts, and its canonical JSON
raw          raw values, the layouts of files by name, streams
signatures   files whose bytes do not match their name
tables       rows of Parquet, CSV and TSV
files        a file → raw values with their line numbers; an unreadable value is yielded as an error
source_files the files of a source that are read, and the others
dataset_info LLaMA-Factory's description of the files of a folder
contract     which fields of a record are refused, and which are counted
messages     sentences of bounded length
turns        parts of a raw value → turns, tools, strings
names        what every layout has: system prompt, tools, earlier turns
formats      a raw value → a `Record`, by the layout of its source
preferences  the layouts of preference records
verdicts     what people judged: the better answer, ranks, scores
notes        counts of what is not read or may not be meant
reading      `read_records`, with which every training stage reads its data
steps        the pipeline's steps, each with its counters
shards       writers: shuffled or in order, `.jsonl.zst` with an index
funnel       per source: records in = records out + records dropped, by reason
"""

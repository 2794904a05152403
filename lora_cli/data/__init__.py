"""Data sets: from files, a folder or the hub to token ids with labels, prepared once and kept, or
streamed.

Its doors, in the order a reader needs them:

    load        the rows a recipe trains on and evaluates on; mixes by weight
    sources     where rows come from; how each data set is opened
    formats     what a row may be, and how its columns tell
    column_kinds
                … and what is in columns that match no format
    readers     the rows of one local file; whether files are there
    tables      … of a CSV file, and whether its first line names the columns
    text_files  … of text; how another file is made of one
    preferences … two conversations in a row, of which one is preferred
    unpaired    … one, with whether its answer is wanted
    pairs       a text that is read and one that is to be written, as token ids
    encode      conversations and texts as token ids with labels
    encoders    … and what makes the rows of each task so
    classify    … texts with what they are told apart by
    tag         … words with a tag each
    asked       … a question, its text and its answers
    questions   … windows over such texts
    classify_pictures
                … pictures with labels
    picture_folder
                … where they lie in a folder for each label
    collate     rows of other tasks as a batch
    labels      what the rows of a recipe are told apart by
    selection   which encoded rows are trained on; long rows and bad ones
    prepare     one data set from its source to its rows, counts and fingerprint
    cache       prepared rows on the disk
"""

__all__ = [
    "asked",
    "cache",
    "classify",
    "classify_pictures",
    "collate",
    "column_kinds",
    "encode",
    "encoders",
    "labels",
    "formats",
    "load",
    "pairs",
    "picture_folder",
    "preferences",
    "prepare",
    "questions",
    "readers",
    "selection",
    "sources",
    "tables",
    "tag",
    "text_files",
    "unpaired",
]

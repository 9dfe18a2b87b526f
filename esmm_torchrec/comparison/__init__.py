"""Conversion methods compared under one protocol: a table, figures and a report.

options      what is compared and how; the settings that tuning tries
data         generated worlds or one prepared data set, opened when first asked for
selection    what tuning chooses by
trial        one training: which rows, which ids, which scores
store        finished trainings on disk, so that a stopped comparison is resumed
study        tunes every method, retrains it, scores it once
statistics   paired differences, Holm's correction, users resampled
results      results.json
verdicts     what was found, in sentences
tables       rows for the report and for a terminal; CSV and Markdown
plots        the volume figure and the others
report       report.html, table.csv, table.md
"""

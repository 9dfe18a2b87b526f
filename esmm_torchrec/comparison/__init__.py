"""Comparison of conversion methods under one protocol: a table, figures and a report.

options      what is compared and how; the settings that tuning tries
data         generated worlds or one prepared data set, opened on first use
selection    the score by which tuning chooses
trial        one training: its rows, ids and scores
store        finished trainings on disk, so that a stopped comparison can be resumed
study        tunes every method, retrains it, scores it once
statistics   paired differences, Holm's correction, resampling of users
results      results.json
verdicts     the findings, in sentences
tables       rows for the report and for a terminal; CSV and Markdown
plots        the volume figure and the others
report       report.html, table.csv, table.md
"""

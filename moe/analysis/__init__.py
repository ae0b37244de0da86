"""Pure functions over the files that runs wrote: rows, paired comparison, plots, report. No torch in here."""

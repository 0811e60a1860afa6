"""Tables, figures and the HTML page of a run, made from the files of its folder only."""

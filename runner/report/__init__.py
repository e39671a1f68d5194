"""Pages and curves from run folders.

- `read`: a run folder's records
- `run_page`: the page of one run
- `training_section`: its curves and epochs
- `comparison_page`: the page of several
- `error_analysis`: where a model is wrong
- `sweep_table`: a sweep's trials
- `page`: what a page is made of
- `render`: a page as HTML and as Markdown, by the templates in `templates/`
- `plots`: curves.svg and curves.png
- `line_chart`: an interactive chart
"""

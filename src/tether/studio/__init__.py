"""The studio: pages to watch runs, look inside completions, compare, and collect preferences. Local and offline.

It reads run directories and one preference store; it never trains. Everything that a model or a person wrote is shown
as text. Reading order: `app` puts the pages together, `security` stands before them, `index` finds runs, then one
module a page.
"""

"""The front door: the command line, and the client that serving code imports.

Enters: command lines, recipes, a store's address. Leaves: tables for people, one JSON document for
programs, exit statuses 0 (done), 1 (something failed), 2 (the recipe or the command line is wrong),
3 (some targets wait for a host that is not here). Map: `app` (the commands), `output` (what is
printed and how errors end), one module for each group of commands.
"""

__version__ = "0.1.0"

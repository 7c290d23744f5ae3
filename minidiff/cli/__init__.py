"""The command line: `minidiff COMMAND --flags`."""

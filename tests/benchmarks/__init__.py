"""minidiff beside diffusers + peft: what `minidiff bench` runs. The package itself never imports this folder.

    __main__        the order of a run, and what is printed
    timing          ABBA order, medians, the confidence interval of a ratio
    work            what is measured in this process: attention, a U-Net call, a picture
    training        training steps: minidiff's own `fit`, with the peers' steps in between
    processes       what needs a process of its own: peak memory, loading, imports, --help
    saved_bytes     what a backward pass keeps, counted on the meta device
    peers           diffusers and peft; nothing else here imports them
    models          random models of SD 1.5's size
    report          the table, the JSON, and (chart) the bar chart

What did not help is in LOG.md.
"""

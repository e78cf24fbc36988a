"""Draft trees: several candidates for each position, all verified in one pass.

    tree = StaticTree.chain(3)                      # or StaticTree(((0,), (1,), (0, 0))): paths of ranks
    tree = parse("tree.json")                       # or "4,3,16": TOPK,DEPTH,NODES, as SGLang draws them
    ranks = measure_ranks(model, samples, 5)        # reference/ranks.py: one teacher-forced pass
    fitted, judged = halves(ranks["full"])
    tree = fit(fitted, nodes=16, depth=3)
    acceptance(tree, judged).accept_length          # tau, with .interval and .position_rates
    generate(model, prompt_ids, 64, tree)           # reference/speculative.py decodes with it

Nodes are counted as SGLang counts them, in tokens of one verify pass: the root, which is the newest committed
token, and the drafts. A chain of K drafts has K + 1 nodes.
"""

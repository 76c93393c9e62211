def terminal(runs): return [r.record.get("evals") or r.record.get("checkpoints") for r in runs]
def affine_table(s): return s
def evals_table(s): return s
def runs_table(s): return [(r.path.name,r.status) for r in s]

def markdown(results): return "x"*600
def report(examined, results, split): return "x"*600

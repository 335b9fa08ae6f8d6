def write_report(results, path, **k): path.write_text("")

# SPOS: uniform sampling, then evolutionary search over the inherited weights.
# It stands after a search config:
# python train_search.py config/search_pydocs.py config/spos.py
optimizer = 'spos'
arch_search = 'evolution' # the published variant with random search: --arch_search=random
out_dir += '_spos'

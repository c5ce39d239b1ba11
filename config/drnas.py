# DrNAS. It stands after a search config:
# python train_search.py config/search_pydocs.py config/drnas.py
optimizer = 'drnas'
out_dir += '_drnas'

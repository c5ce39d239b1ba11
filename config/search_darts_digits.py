# The DARTS cells, four of them on 8 x 8 digits, on a laptop: no download, no GPU.
# python train_search.py config/search_darts_digits.py config/drnas.py
include('shared/digits_search.py')
space = 'darts'
out_dir = 'out/search_darts_digits'
init_channels = 4
n_layer = 4
affine = False

# NAS-Bench-201's cell on 8 x 8 digits, on a laptop: no download, no GPU.
# python train_search.py config/search_nb201_digits.py config/drnas.py
include('shared/digits_search.py')
space = 'nb201'
out_dir = 'out/search_nb201_digits'
init_channels = 8
n_cell = 1
affine = False

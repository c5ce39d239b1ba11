# 120 networks of a search's space near 200,000, 400,000 and 600,000 parameters, trained for 300
# steps each, a third of them twice: a table to judge searches by. An hour in two processes, which
# are the same command twice.
# python train_search.py --max_iters=0 --out_dir=out/space_pydocs
# python train_base.py config/table_pydocs.py --arch=out/space_pydocs/arch.json
table = 'assets/pydocs.csv'
bands = [200000, 400000, 600000]
n_archs = 40
seeds = [1, 2]
batch_size = 16
max_iters = 300
val_portion = 0.0
learning_rate = 2e-3
min_lr = learning_rate / 10
